"""Why a kernel can't be had on this machine at this time."""


class KernelUnavailableError(RuntimeError):
    """The library of a kernel can be neither read nor compiled here and now: the disk is full, the cache's
    folder belongs to somebody else, a compiler can't run.

    It says nothing of the kernel: another machine, or this one after what the message asks for, can compile
    it. A kernel that can't be compiled anywhere is a plain RuntimeError.
    """


class CompilerMissingError(KernelUnavailableError):
    """A kernel would have to be compiled, and TVM, a C++ compiler or nvcc is missing."""
