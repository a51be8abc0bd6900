-- What only shape A has a place for.
UPDATE profiles SET first_name = initcap(split_part(email, '@', 1)), last_name = 'Example';
