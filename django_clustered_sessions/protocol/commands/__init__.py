"""Build the calls to the store, and read their replies: a module for each subject. Pure.

Each builder stands beside the parser of its reply.
"""
