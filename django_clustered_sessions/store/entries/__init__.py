"""Read the entry of CACHES that names the store, in the words of the package that it is for.

An adapter for each package, by names only: none of those packages is imported here, but a site's
own subclass of a backend is. Nothing is connected.
"""
