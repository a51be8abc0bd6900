"use strict";

SwaggerUIBundle({
  url: "../openapi.json",
  dom_id: "#operations",
  deepLinking: true,
  // Nobody outside is asked whether the description is valid.
  validatorUrl: null,
});
