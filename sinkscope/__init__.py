"""sinkscope: measure, explain and control attention sinks."""
