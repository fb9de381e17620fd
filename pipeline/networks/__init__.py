"""Networks that training and generation both need, one architecture a file, kept as diffusers keeps models (`from_pretrained`)."""
