"""Who stays in memory: loads on demand within a budget, least recently used ones leave."""
