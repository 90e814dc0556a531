"""One layer's attention, read without a T × T pattern: the streaming path and its arithmetic."""
