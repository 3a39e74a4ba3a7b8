"""What several tests share: tiny models, a hub, servers, stand-in workers."""
