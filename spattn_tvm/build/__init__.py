"""From decisions to a kernel library: toolchain, compiling, the cache on disk."""
