"""The ways to keep documents apart: block-diagonal attention, the model's own kernels, or documents run as a padded batch."""
