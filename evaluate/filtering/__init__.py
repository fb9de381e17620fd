"""`filter`: which synthetic images pass for real ones? It judges, and starts `generate` to draw again.

It lies in `evaluate` because its criteria share the segmenter, the classifier, the features and the
search for copies with the metrics, and `generate` imports no other stage. Thresholds come from real
validation images alone; no test image is read.
"""
