"""Connection slots, one call, what an answer means, pacing. Every httpx name lives in this room."""
