"""Which structure, method and recovery is worth it on one's own model and data, at equal parameters and equal steps."""
from .job import compare
