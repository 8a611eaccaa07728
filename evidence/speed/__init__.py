"""Time, memory and latency of training steps and of exported files."""
