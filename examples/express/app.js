// An application with routes that need permissions.

import express from 'express';
import { requireMultiplePermissions, requireOrgPermission } from './organizationPermissions.js';

const app = express();

// Stands in for your own authentication (PTO Connect's getUserOrgContext), which takes both from a verified token.
// Who can send these headers can be anyone: for trying it out on your own machine.
app.use((req, res, next) => {
  const [user, organization] = [req.get('x-user-id'), req.get('x-org-id')];
  if (user) req.user = { id: user };
  if (organization) req.orgId = organization;
  next();
});

const done = (req, res) => res.json({ done: `${req.method} ${req.path}` });
app.get('/budget', requireOrgPermission('can_view_budget'), done);
app.post('/expenses/approve', requireOrgPermission('can_approve_expenses'), done);
app.post('/budget/close', requireMultiplePermissions(['can_edit_budget_items', 'can_approve_expenses'], 'AND'), done);
app.get('/inbox', requireMultiplePermissions(['can_view_messages', 'can_approve_expenses'], 'OR'), done);

const server = app.listen(process.env.PORT ?? 3000, '127.0.0.1', (error) => {
  if (error) throw error;
  console.log(`http://127.0.0.1:${server.address().port}`);
});
