"""Triton kernels of the fused ops, imported as `htv.triton_kernels`; same names as in
`htv.ops.reference`.
"""
