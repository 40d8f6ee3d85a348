"""What the image gives every container. The Dockerfile has to make it so, and the pods have to fit it."""

from __future__ import annotations

UID = 1000
"""The user's, and its group's."""
HOME = "/home/expertmesh"
PROGRAMS = "/opt/expertmesh"
