"""Streaming attention: statistics of a layer's attention without a T × T pattern."""
