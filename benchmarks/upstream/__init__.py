"""PEFT's own comparison of methods, run with this library's settings at the scale of two cores."""
