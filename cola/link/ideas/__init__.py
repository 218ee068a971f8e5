"""Ideas that fill the joints of a link, a file each, and the door through which they and a user's own come in."""
