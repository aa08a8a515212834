"""Measuring a model, alone or beside a reference, and judging the measures against bounds."""
