"""The file descriptors of the process: cameras, connections and files each take one."""

import resource

MOST = 65_536
"""More would only make children slower that close all they could have inherited."""


def raise_descriptor_limit(most: int = MOST) -> int:
    """Raise the soft limit to the hard one, at most to `most`, and give the limit that is then in force.

    The soft limit of most shells and services is 1024, which cameras and clients together can reach.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return descriptor_limit()
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def descriptor_limit() -> int:
    """The soft limit that is in force; at most 2**31 where there is none."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 if soft == resource.RLIM_INFINITY else soft
