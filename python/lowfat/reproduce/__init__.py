"""The experiments of the papers behind this package, on tasks that are there without a network."""
from .job import reproduce
from .papers import PAPERS
