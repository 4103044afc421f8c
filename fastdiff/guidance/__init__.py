"""Guidance: which branches of a model run at a step, and with which weights they are combined."""

from fastdiff.guidance.classifier_free import ClassifierFree

__all__ = ["ClassifierFree"]
