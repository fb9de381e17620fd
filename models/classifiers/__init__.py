"""Classification networks, found by file name: the option `architecture` of what trains a classifier.

A network's file provides:

- `Options`, a `Section`: the network's own settings.
- `LEARNING_RATE`: used where the configuration gives none.
- `sides(options)`: the number that both sides of an image must be multiples of, and the smallest side.
- `build(options, image_channels, classes, image_size)`: the untrained network, which maps images
  (B, image_channels, H, W) in [-1, 1] to (B, classes) logits, or to a list of them, the final ones first.
- `loss(outputs, labels)`, optional: the training loss of the network's output and (B,) int64 labels.
  Without it, the loss is the mean of the cross-entropy over all logits.
- `check()`, optional: raises `MaskLoomError` where a package that the network needs is missing.

Nothing imports torch or MONAI when the file is imported.
"""
