"""Moving in: sessions of the engine that the site used before are taken over, each once.

A session that the store knows nothing of is looked up in the old engine. What is found there is
stored here by one script, which also marks it as taken over, so an old cookie brings nothing back
that has ended here. In the old engine the session stays: nodes that still use it go on, and so
does the site where it has to go back. Only what is ended here is deleted there too.
"""

from __future__ import annotations
