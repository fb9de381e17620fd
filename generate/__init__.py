"""The stage `generate`: trained generator + masks -> synthetic mask-and-prompt dataset.

It trains nothing, imports no other stage, and never uses a validation or test mask as condition.
"""
