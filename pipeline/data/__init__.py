"""Image files to arrays, boxes and masks: the one place where pictures are decoded and fitted to a network."""
