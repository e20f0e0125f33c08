"""Network families: planning, building, wrapping for pretext tasks, weight transfer."""
