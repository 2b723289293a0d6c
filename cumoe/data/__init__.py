"""The nouns: routers, routings, groups, weights. Checked when they are made, passed on unchanged."""
