"""Build what is asked of the store, and read its replies: a module for each subject. Pure.

Each builder stands beside the parser of its reply.
"""
