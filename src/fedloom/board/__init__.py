"""The page that watches: runs below a folder, live, beside each other, and in a chat."""
