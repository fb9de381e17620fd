"""`push`: what goes to the Hugging Face Hub, the checks before it goes, its cards, and the upload.

Nothing else of the package talks to a repository of the user's.
"""
