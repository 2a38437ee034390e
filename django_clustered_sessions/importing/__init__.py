"""Import of sessions from the engine that the site used before; each is taken over once.

A session that the store does not have is looked up in the old engine. One script stores it and
marks it as taken over, so an old cookie cannot restore a session that has ended here. The old
engine keeps the session, so nodes that still use that engine go on, and the site can switch back.
Sessions that end here are deleted there too.
"""

from __future__ import annotations
