"""`inspect`: what lies in a raw folder, what an adapter makes of it, and which options fit it.

It writes nothing and decides nothing for `prepare`.
"""
