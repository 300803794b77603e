"""Every process-wide patch of torch, transformers and other libraries: one file a patch or a group that belongs together.

`registry` holds the declaration of each and tells which are active. The patches know nothing of what they are used for: the
packages above pass in the functions that they call.
"""
