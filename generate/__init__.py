"""The stage `generate`: trained generator + masks -> synthetic mask-and-prompt dataset.

It trains nothing, imports no other stage, and never conditions on a validation or test mask.
"""
