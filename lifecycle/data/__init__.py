"""Reading, validating, templating, masking and packing of text and conversations."""
