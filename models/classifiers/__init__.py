"""Classification networks, found by file name: the option `architecture` of a classifier.

A network's file provides:

- `Options`, a `Section`: the network's own settings.
- `LEARNING_RATE`: used where the configuration gives none.
- `sides(options)`: the factor of both sides of an image, and the smallest side.
- `build(options, image_channels, classes, image_size)`: the untrained network, which maps images
  (B, image_channels, H, W) in [-1, 1] to logits (B, classes), or to a list, the final ones first.
- `loss(outputs, labels)`, optional: the training loss of the network's output and int64 labels (B,).
  Without it, the loss is the mean of the cross-entropy over all logits.
- `check()`, optional: raises `MaskLoomError` where a package that the network needs is missing.

Nothing imports torch or MONAI when the file is imported.
"""
