"""Raw labelled images -> mask-and-prompt dataset."""
