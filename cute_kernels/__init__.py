"""The ground of the library: error types, the block layout, configurations, and the kernels with their compiler.

Nothing here imports torch. Installed, this is ``bitdecoding.cute_kernels``; the build imports it from the source root.
"""
