"""Photos and captions: found, decoded and addressed, and what is made of a photo before a model sees it."""
