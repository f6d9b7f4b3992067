"""What ``python -m eve_ds.plan`` works out: parameters, memory, operations, bytes on the wire."""
