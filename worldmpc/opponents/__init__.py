"""Opponents: whom we play (:mod:`.pool`, :mod:`.loaders`, :mod:`.match`, :mod:`.ratings`) and whom we imagine (:mod:`.simulation`).

The two are separate concepts, and neither knows of the other.
"""
