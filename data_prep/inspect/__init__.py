"""`inspect`: describes a raw folder, tries the matching adapters on it, and suggests options.

It writes nothing and does not influence `prepare`.
"""
