"""Whether a prepared dataset may be trained on and measured with: images that its splits share, and labels that contradict."""
