"""From image files and TFDS data sets to packs of decoded images."""
