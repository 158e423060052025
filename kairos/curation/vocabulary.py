"""The tags of Kairos 3.0, section 4: one domain a clip, and any number of events."""

DOMAINS = ("human", "robot", "physics", "general")
EVENTS = (
    "contact",
    "collision",
    "sliding",
    "rolling",
    "deformation",
    "support",
    "fluid",
    "gravity",
    "tool use",
    "occlusion",
    "failure",
    "recovery",
)
