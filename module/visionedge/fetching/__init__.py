"""Models by address: fetched with limits, checked by their sha256, kept in the data folder.

address     what an address may be, what a model from there is called
kept        the files in the data folder: parts, whole ones, which go first
attempt     one try over the network, or from a file
fetch       try after try on a thread of its own, and what is said meanwhile
"""
