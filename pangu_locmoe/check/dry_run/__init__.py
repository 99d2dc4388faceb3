"""A dry run: ranks' steps compiled by MindSpore's own Ascend back end, and walked through, without
a device and without CANN (`pangu-locmoe check --simulate`).

MindSpore's wheel for Linux holds the whole Ascend plugin: graph passes, selection of kernels, plans
of memory, streams and launches. Only CANN's libraries, to which it links, are missing.
"""
