"""How many bytes the general paths may take for what they compute a piece at a time."""

SCRATCH_BYTES = 4 << 20  # a slice of contributions, and a slice's operands
WINDOW_BYTES = 8 << 20  # the windows of a convolution's input, and the gradients beside them
GROUPWISE_BYTES = (
    64 << 20
)  # a slice of contributions where every slice costs a pass over all groups
