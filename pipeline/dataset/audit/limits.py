"""Up to how many images the audit looks for near-duplicates unasked."""

NEAR_LIMIT = 20_000  # images, about ten minutes of a core; above it near-duplicates are looked for only where `verify --near` asks for them
