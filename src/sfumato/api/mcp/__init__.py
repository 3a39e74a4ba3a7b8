"""The Model Context Protocol at `/mcp`: tools with which a chat program's model draws."""
