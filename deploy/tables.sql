-- The tables of handlers/*.toml, made when the Postgres of docker-compose.yml is.

CREATE SCHEMA IF NOT EXISTS web;
CREATE TABLE web.clicks (
    event_id   uuid PRIMARY KEY,
    happened   timestamptz NOT NULL,
    visitor    text NOT NULL,
    url        text NOT NULL,
    country    varchar(2),
    duration   double precision,
    properties jsonb
);

CREATE SCHEMA IF NOT EXISTS sales;
CREATE TABLE sales.orders (
    order_id  bigint PRIMARY KEY,
    customer  text NOT NULL,
    status    varchar(20) NOT NULL,
    amount    numeric(12, 2) NOT NULL CHECK (amount >= 0),
    placed_at timestamptz NOT NULL,
    paid      boolean,
    lines     jsonb
);

CREATE TABLE sales.order_lines (
    order_id  bigint,
    line      integer,
    sku       text NOT NULL,
    quantity  integer NOT NULL,
    total     numeric(12, 2) NOT NULL,
    placed_at timestamptz NOT NULL,
    PRIMARY KEY (order_id, line)
);
